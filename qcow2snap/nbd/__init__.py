"""The NBD protocol, both sides of it: exports, negotiation, transmission, server, client."""
