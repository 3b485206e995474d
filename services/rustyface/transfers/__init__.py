"""Jobs on whole datasets: import, export, embedding anew."""
