"""Real parts that tests share: loopback servers, terminals, small models."""
