# Symlink tree that gives mypy, editors and a working checkout the import names of the installed package.
.PHONY: pyview
pyview:
	mkdir -p build/pyview/edgelm
	find build/pyview/edgelm -xtype l -delete
	for f in edgelm/*; do ln -sfn ../../../$$f build/pyview/edgelm/; done
	for d in export quant runtimes; do ln -sfn ../../../$$d build/pyview/edgelm/$$d; done
