string(APPEND build_report "cuda: not built\n")
