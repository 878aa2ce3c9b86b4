"""Grasping with a camera in the palm: a Panda arm, a table and an object to be lifted, on PyBullet."""
