"""What the screens do with models and pictures. Only these modules import torch; the page is up before they are loaded."""
