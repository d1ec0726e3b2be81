# Symlink tree that gives mypy, editors and a working checkout the import names of the installed package.
.PHONY: pyview
pyview:
	rm -rf build/pyview && mkdir -p build/pyview/edgelm
	for f in edgelm/*; do ln -s ../../../$$f build/pyview/edgelm/; done
	for d in export quant runtimes; do ln -s ../../../$$d build/pyview/edgelm/$$d; done
