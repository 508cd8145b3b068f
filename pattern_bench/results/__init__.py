"""The files of a run, their columns and keys; and how estimators and methods are written for people."""
