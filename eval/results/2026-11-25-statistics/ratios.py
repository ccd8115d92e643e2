"""How often two models that differ by luck alone are called different in bits per byte: `python ratios.py`.

Documents have lognormal lengths; the difference of a document's sum is normal, with a spread in proportion to its
length or to the root of it. The sign-flip test is taken over the documents' shares of the ratio, as `crrelu eval`
does, and over the linearised values, as it did before.
"""

import numpy as np

from crrelu_llm.evaluation.measured import linearised, shares_of
from crrelu_llm.statistics import paired

paired.RESAMPLES = 999
TRIALS = 400
SPREADS = {"length": lambda size: size, "root of length": np.sqrt}

generator = np.random.default_rng(1)
print("| documents | σ of log length | spread | shares | verdict | linearised |")
print("|---|---|---|---|---|---|")
for documents in (8, 20, 60):
    for sigma in (0.5, 1.0, 1.5):
        for name, spread in SPREADS.items():
            false = np.zeros(3)
            for _ in range(TRIALS):
                size = generator.lognormal(6, sigma, documents)
                nll = size * generator.normal(3, 0.3, documents)
                other = nll + spread(size) * generator.normal(0, 0.01, documents)
                values = [linearised(sums, size) for sums in (nll, other)]
                shares = (shares_of(nll, size), shares_of(other, size))
                names = {"baseline_name": "a", "candidate_name": "b"}
                new, old = (
                    paired.compare_metric("bits", False, *values, "item", **names, shares=given)
                    for given in (shares, None)
                )
                false += [new.p_value < 0.05, new.verdict != "undecided", old.p_value < 0.05]
            cells = " | ".join(f"{share:.1%}" for share in false / TRIALS)
            print(f"| {documents} | {sigma} | {name} | {cells} |", flush=True)
