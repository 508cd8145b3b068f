"""``python -m pattern_bench.gallery``: galleries of explanations."""

from pattern_bench.commands.gallery import main

if __name__ == "__main__":
    main()
