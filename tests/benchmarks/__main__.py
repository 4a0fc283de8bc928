"""Every comparison, one table: ``python -m tests.benchmarks``."""

from tests.benchmarks import classification_step, gan_alternation, layer_overhead, maml_step
from tests.benchmarks.interleave import machine

print(classification_step.report())
print(gan_alternation.report())
print(layer_overhead.report())
print(maml_step.report())
print(machine())
