"""Every colour of pages and figures: light, dark and on paper."""

LIGHT = {
    "page": "#fff", "text": "#1c2024", "soft": "#5b6470", "line": "#e2e5e9", "panel": "#f5f6f8",
    "blue": "#2f6db5", "orange": "#c4561a", "grey": "#5b6470", "green": "#1b7f3b",
    "red": "#b3261e",
}  # fmt: skip
DARK = {
    "page": "#15181c", "text": "#e6e8ea", "soft": "#9aa3ad", "line": "#2c3238", "panel": "#1e2328",
    "blue": "#6aa9f0", "orange": "#f0985c", "grey": "#aab3bd", "green": "#5cc47e",
    "red": "#f2857d",
}  # fmt: skip
PRINT = LIGHT | {
    "text": "#000", "soft": "#444", "line": "#ccc", "panel": "#f3f3f3", "grey": "#444",
}  # fmt: skip
