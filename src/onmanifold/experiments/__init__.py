"""Experiments: from one YAML file to trained classifiers, their evaluation and a report."""
