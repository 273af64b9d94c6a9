"""Everything that touches Pyro programs: reading, probing, running, simulating and scoring them."""
