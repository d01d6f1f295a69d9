"""Names of the entities that tests link to."""

ENTITY_NAMES = [
    "brown bear", "polar bear", "teddy bear", "bear", "steam train", "bullet train", "train", "tram", "red apple",
    "green apple", "apple", "apple pie", "crescent moon", "full moon", "moon cake", "star", "shooting star", "starfish",
    "dog", "guide dog", "hot dog", "cat", "black cat", "wild cat", "sun", "sunflower", "sun with face", "rainbow",
]  # fmt: skip
