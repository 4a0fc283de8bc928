"""Reinforcement-learning environments whose state is exact: in the middle of an episode, on any number of processes.

The modules need gymnasium; nothing here imports MuJoCo, Box2D or ale-py before an environment has.
"""
