"""Metrics, floors, statistics, claims and the report page."""
