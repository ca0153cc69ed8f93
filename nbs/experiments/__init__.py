"Parameterised experiment notebooks, run by `rg-tickets run` or by papermill."
