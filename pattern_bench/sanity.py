"""``python -m pattern_bench.sanity``: sanity checks of explanations."""

from pattern_bench.commands.sanity import main

if __name__ == "__main__":
    main()
