"""The table of image-classification families: which are patched, with how many sites, and why the others are not.

    PYTHONPATH=tests/support python eval/results/2026-11-28-vision/table.py

Every model is built tiny from its default configuration; tests/patching/test_image_families.py holds the same facts,
and patches, runs, reloads and unpatches each.
"""

import json
import re
import sys
from collections import Counter

import transformers
from image_families import CLASSES, image_model

from crrelu_llm.errors import InputError
from crrelu_llm.patching.sites import survey


def facts(family):
    """What tests/patching/image_families.json says of a family, and the row of the table."""
    try:
        model = image_model(family, "meta")
    except ImportError as error:
        package = re.search(r"requires the (\w+) library", str(error))[1]
        return {"not_built": f"requires the {package} library"}, ("not built", "", "", f"needs {package}")
    try:
        sites, left_alone = survey(model)
    except InputError as error:
        return {"refused": str(error)}, ("refused", "", "", str(error))
    found = {numbered(site.path): f"{site.original} {site.kind}" for site in sites}
    left = {numbered(item.path): item.reason for item in left_alone}
    originals = ", ".join(sorted({site.original for site in sites}))
    row = ("patched", str(len(sites)), originals, "; ".join(sorted({_short(reason) for reason in left.values()})))
    return {"sites": found, "left_alone": left}, row


def numbered(path):
    """A path with # for the numbers in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path)


def _short(reason):
    return re.sub(r"inside \S+: ", "", reason).partition(" (")[0]


def main():
    """Prints the table, or with --json the facts."""
    found = {family: facts(family) for family in CLASSES}
    if "--json" in sys.argv:
        print(json.dumps({family: entry for family, (entry, _) in found.items()}, indent=1, ensure_ascii=False))
        return
    counts = Counter(row[0] for _, row in found.values())
    print(f"# Image-classification families of transformers {transformers.__version__}\n")
    print(", ".join(f"{count} {state}" for state, count in counts.items()) + ". Tiny models, so the sites are few.\n")
    print("| family | | sites | activation | left alone, or why not |\n|---|---|---|---|---|")
    for family, (_, (state, sites, originals, why)) in found.items():
        print(f"| {family} | {state} | {sites} | {originals} | {why} |")
    print("\nCommand: `PYTHONPATH=tests/support python eval/results/2026-11-28-vision/table.py`")


if __name__ == "__main__":
    main()
