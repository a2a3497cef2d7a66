"""Providers that can be had on one machine: each speaks its real wire protocol and fails when told to."""
