from guided_diffusion.commands.sample import run

if __name__ == "__main__":
    run()
