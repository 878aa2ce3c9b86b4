"""Meta-World: fifty manipulation tasks of one simulated Sawyer arm.

Source: T. Yu et al., "Meta-World: A Benchmark and Evaluation for Multi-Task and Meta Reinforcement Learning", CoRL
2019; the tasks' physics, rewards and scripted experts are those of the ``metaworld`` package (MIT).
"""
