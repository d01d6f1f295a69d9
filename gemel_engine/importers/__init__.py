"""Tables of entities from public dumps and other tables; a knowledge base is built from them."""
