"""``python -m pattern_bench.dashboard``: W&B views and a W&B report of what runs measured."""

from pattern_bench.commands.dashboard import main

if __name__ == "__main__":
    main()
