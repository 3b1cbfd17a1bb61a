from guided_diffusion.commands.phantoms import run

if __name__ == "__main__":
    run()
