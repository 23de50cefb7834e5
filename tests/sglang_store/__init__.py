"""SGLang's own classes, and a whole SGLang engine on the CPU, with our storage behind them."""
