"""OfficeNav: the office that an agent must learn to read."""
