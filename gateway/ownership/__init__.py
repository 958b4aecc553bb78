"""Decides which instance has each tenant's name (`names`) and which tenant has each domain (`domains`)."""
