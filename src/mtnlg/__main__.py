"""``python -m mtnlg`` is the ``mtnlg`` command."""

from mtnlg.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
