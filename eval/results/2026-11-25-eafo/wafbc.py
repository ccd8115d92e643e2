"""Prints the entropy that random neighbours of a WAFBC lose, for several densities and step sizes.

python wafbc.py > wafbc.txt
"""

import numpy as np

from crrelu_llm.eafo import parsing, wafbc
from crrelu_llm.eafo.entropy import of_output

print(f"{'density':36} {'log 3':>9} {'WAFBC':>9}  nats lost by 200 neighbours: size, least, median, largest")
for text in ("normal", "logistic(1,2)", "laplace", "student_t(5)", "0.4*normal(-2,1) + 0.6*normal(1,0.5)"):
    worst = wafbc.wafbc(parsing.density(text), -1, 2)
    entropy = of_output(worst, worst.density).value
    for size in (0.01, 0.1, 0.5):
        lost = wafbc.losses(worst, size, 200)
        numbers = " ".join(f"{value:.3e}" for value in (lost.min(), np.median(lost), lost.max()))
        print(f"{text:36} {np.log(3):9.6f} {entropy:9.6f}  {size:4} {numbers}")
