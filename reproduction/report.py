"""Write the page with all results of a profile: ``python -m reproduction.report notebooks/profiles/full.yaml``.

Nothing is run; the page shows the files that are there. `reproduction.page` says what it holds.
"""

import argparse
import sys
from pathlib import Path

from reproduction.page import write_page
from reproduction.pipeline import steps_of
from reproduction.profiles import load_profile
from reproduction.tables import ROOT


def main() -> int:
    """Run the command. Exit code 0: the page was written; 2: wrong input."""
    parser = argparse.ArgumentParser(prog="python -m reproduction.report", description="Write the page of a profile.")
    parser.add_argument("profile", type=Path, help="the YAML file of a profile")
    arguments = parser.parse_args()
    try:
        profile = load_profile(arguments.profile)
        page = write_page(profile, steps_of(profile, ROOT), ROOT / "figures" / profile["profile"])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{page.relative_to(ROOT).as_posix()} has all results on one page.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
