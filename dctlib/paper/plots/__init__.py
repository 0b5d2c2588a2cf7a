"""Figures from arrays and tables. Nothing here touches a model or opens a window."""
