"""Reference posteriors by NUTS, SMC and ABC."""
