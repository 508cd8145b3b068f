"""``python -m pattern_bench.cache``: what the cache holds, and how it is emptied."""

from pattern_bench.commands.cache import main

if __name__ == "__main__":
    main()
