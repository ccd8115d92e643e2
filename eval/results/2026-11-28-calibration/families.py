"""How many of transformers' causal-LM families get the whole fit: each as a tiny model, as the tests build it.

python families.py > families.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
import torch
from families import FACTS, PATCHED, family_model

from crrelu_llm import patch
from crrelu_llm.patching.sites import find_sites

BLOCKS = torch.randint(3, 64, (16, 16), generator=torch.Generator().manual_seed(2))
found = {"patched": len(PATCHED), "refused": 0, "not_built": 0, "whole_fit": 0, "less": {}}
for family, facts in FACTS.items():
    if family not in PATCHED:
        found["refused" if "refused" in facts else "not_built"] += 1
        continue
    model = family_model(family)
    try:
        sites = patch(model, blocks=BLOCKS, calibration="fit", epsilon_per="channel").sites
    except Exception as error:
        found["less"][family] = f"{type(error).__name__}: {str(error)[:150]}"
        continue
    lower = [f"{site['path']}: {site['kept']}: {site['note']}" for site in sites if site["kept"] != "fit"]
    assert len(sites) == len(find_sites(family_model(family)))
    if lower:
        found["less"][family] = lower
    else:
        found["whole_fit"] += 1
print(json.dumps(found, indent=1))
