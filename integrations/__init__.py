"""Adapters for the frameworks people train in; one file for each, importing its framework only when used."""
