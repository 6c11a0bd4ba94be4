"""``python -m tikmix_fast``: the same as the command ``tikmix-fast``."""

from tikmix_fast.cli import main

if __name__ == "__main__":
    main()
