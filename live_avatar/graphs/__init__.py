"""The exported graphs: contracts, components, artifacts folders, engine records, memory."""
