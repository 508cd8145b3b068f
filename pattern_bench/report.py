"""``python -m pattern_bench.report``: the tables, figures and page of many runs."""

from pattern_bench.commands.report import main

if __name__ == "__main__":
    main()
