from guided_diffusion.commands.export import run

if __name__ == "__main__":
    run()
