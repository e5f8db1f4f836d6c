"""Decide, plan, run and compare trainings: advise | plan | run | compare.

Imports point down: errors < quantities, locations < spec < planning, policy < tracking < training
< scheduling < cli, jobs.
"""

__version__ = "0.1.0"
