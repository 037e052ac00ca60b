"""Thin library behind the BERT compression study: one loader, one training loop, one benchmark, one record format."""
