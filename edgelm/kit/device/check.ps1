# Checks this machine with the kit in this folder, offline and without Python:
#   powershell -NoProfile -ExecutionPolicy Bypass -File check.ps1
# It writes report.json into this folder, nothing else. Options are those of edgelm-parity: --threads N, --kv TYPE.
$ErrorActionPreference = "Stop"
Set-Location -LiteralPath $PSScriptRoot

$wrong = @()
$count = 0
foreach ($line in Get-Content -LiteralPath SHA256SUMS) {
    $sum, $name = $line -split "  ", 2
    $count += 1
    if (-not (Test-Path -LiteralPath $name -PathType Leaf)) {
        $wrong += "${name}: missing"
    } elseif ((Get-FileHash -LiteralPath $name -Algorithm SHA256).Hash -ne $sum) {
        $wrong += "${name}: damaged"
    }
}
if ($wrong.Count -gt 0 -or $count -eq 0) {
    $wrong | ForEach-Object { Write-Host $_ }
    Write-Host "check.ps1: the files above are missing or damaged: unpack the kit again, or copy it again"
    exit 1
}
Write-Host "files     $count files, every hash is that of the kit"
if (-not [Environment]::Is64BitOperatingSystem) {
    Write-Host "check.ps1: this kit is for 64-bit Windows"
    exit 1
}

& .\libedgelm\bin\edgelm-parity.exe bundle --json report.json @args
$status = $LASTEXITCODE
if ($status -eq 0) {
    Write-Host "`nThe parity check passed. report.json tells more."
} else {
    Write-Host "`nThe parity check FAILED (exit code $status): do not use the model on this machine."
}
exit $status
