"""From stages and nodes to seats: costs, devices, schedules, and the placer that asks for them again and again."""
