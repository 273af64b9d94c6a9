"""Estimators side by side at equal budgets."""
