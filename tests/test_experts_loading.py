"""Mixture-of-experts models through from_pretrained and save_pretrained."""

from __future__ import annotations
