"""fleet-tools: contact-rich tool use; ``gym.make("FleetTools/Hammer-v0")``. Imports nothing heavy."""
