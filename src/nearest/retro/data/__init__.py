"""RETRO's data: from documents to chunks, and from chunks to their neighbours."""
