"""Floor 2: vision towers over packed views of any size."""
