"""Everything that touches Pyro programs: reading, probing, running and scoring them."""
