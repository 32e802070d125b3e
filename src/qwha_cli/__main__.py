"""`python -m qwha_cli` is `qwha`."""

from __future__ import annotations

from qwha_cli.cli.app import main

if __name__ == "__main__":
    main()
