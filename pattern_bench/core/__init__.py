"""The arithmetic: statistics, estimators, rho, backward rules and degradation. Imports torch alone."""
