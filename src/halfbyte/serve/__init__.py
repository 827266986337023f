"""One door before several precisions of a model: rules choose, unchanged servers answer (``halfbyte serve``)."""
