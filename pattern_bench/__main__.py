"""``python -m pattern_bench``: the main job."""

from pattern_bench.commands.job import main

if __name__ == "__main__":
    main()
